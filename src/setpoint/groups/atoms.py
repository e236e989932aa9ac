"""Atoms: one integer for every entry of every tensor dim, united where entries must be dropped together."""

import numpy as np
from jaxtyping import Int

Labels = Int[np.ndarray, " entries"]  # one atom per entry along a dim


class Atoms:
    """Classes of entries that are kept or dropped together, as a disjoint-set forest on one integer array.

    Atom 0 stands for "frozen": whatever is united with it is never dropped. Parents are smaller than their children, so
    0 is the root of everything frozen.

    Args:
        spared: how reasons begin for which `freeze` only notes the entries, to see what they cost.

    >>> atoms = Atoms()
    >>> a, b = atoms.fresh(3), atoms.fresh(3)
    >>> atoms.unite(a, b)
    >>> bool((atoms.find(a) == atoms.find(b)).all())
    True
    """

    def __init__(self, spared: tuple[str, ...] = ()) -> None:
        self._spared = spared
        self._parent = np.zeros(1024, dtype=np.int64)
        self._count = 1
        self.frozen: list[tuple[Labels, str, str]] = []  # what was frozen: (atoms, place, reason), in order
        self.lossy: list[tuple[Labels, str]] = []  # atoms for which zero is not absent: (atoms, reason)
        self.marks: dict[str, list[Labels]] = {}
        """Atoms by remark: "produce", "consume", "contract", "batch", "conv", "embedding",
        "alike" (copies and constants), "summed", "squeezed", "unmasked", "aligned"."""

    def fresh(self, num: int) -> Labels:
        """New atoms, each alone in its class."""
        first, self._count = self._count, self._count + num
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent[:first], np.zeros(2 * self._count - first, dtype=np.int64)])
        self._parent[first : self._count] = np.arange(first, self._count)
        return np.arange(first, self._count)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """Root of each atom; the shape is kept."""
        roots: np.ndarray = self._parent[labels]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[labels] = roots  # path compression
        return roots

    @property
    def roots(self) -> np.ndarray:
        """Root of every atom."""
        return self.find(np.arange(self._count))

    def unite(self, left: np.ndarray, right: np.ndarray) -> None:
        """Put `left[i]` and `right[i]` into one class, for every i."""
        left, right = (side.ravel() for side in np.broadcast_arrays(left, right))
        while True:
            a, b = self.find(left), self.find(right)
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self._parent, high, low)
            # A root that occurs in two pairs got only the smaller parent: another round unites the other pair.

    def freeze(self, labels: np.ndarray | None, place: str, reason: str) -> None:
        """Never drop these entries, and record why."""
        if labels is not None and self.find(labels).any():
            self.frozen.append((np.asarray(labels).ravel(), place, reason))
            if not reason.startswith(self._spared):
                self.unite(labels, np.zeros(1, dtype=np.int64))

    def first_frozen(self) -> np.ndarray:
        """Per atom: the number of the first record in `frozen` of it; or -1, also where it was only united with one."""
        first = np.full(self._count, -1)
        for number, (labels, _, _) in reversed(list(enumerate(self.frozen))):
            first[labels] = number
        return first

    def mark(self, remark: str, labels: np.ndarray | None) -> None:
        """Record a remark about these atoms, not about their class."""
        if labels is not None:
            self.marks.setdefault(remark, []).append(np.asarray(labels).ravel())

    def marked(self, remark: str) -> np.ndarray:
        """Boolean per atom: whether the remark was made about it."""
        result = np.zeros(self._count, dtype=bool)
        for labels in self.marks.get(remark, ()):
            result[labels] = True
        return result

    def marked_class(self, remark: str) -> np.ndarray:
        """Boolean per atom: whether the remark was made about any atom of its class."""
        roots = self.roots
        return np.isin(roots, roots[self.marked(remark)])
