"""About: what each method does, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

METHODS: Mapping[str, str] = {
    "dense": "The full model.",
    "small": "A uniformly narrower model at the budget, from scratch, for the same steps.",
    "small-long": "As small, for as many steps as Setpoint's whole training FLOPs pay for.",
    "magnitude-oneshot": "Dense, then the smallest weights of each tensor masked, then fine-tuned.",
    "filter-oneshot": "Dense, then units cut by the norm of their weights, then fine-tuned.",
    "torch-pruning-norm": "Dense, then cut by the library Torch-Pruning by group norms, then fine-tuned.",
    "torch-pruning-taylor": "Dense, then cut by the library Torch-Pruning by its Taylor criterion, then fine-tuned.",
    "filter-first": "Cut by norms after the first step, then trained.",
    "cubic": "All groups narrowed evenly along a cubic schedule, by norms.",
    "gmp": "Weights masked by magnitude along a cubic schedule.",
    "setpoint": "Closed loop, widths free, Taylor readings.",
    "fitted-first": "Cut by compress before the first step, then trained.",
    "setpoint-uniform": "Closed loop, all groups at the same density.",
    "setpoint-first": "Closed loop, settled by 2 % of the run: for a pretrained model.",
    "setpoint-early": "Closed loop, settled by 10 % of the run.",
    "setpoint-late": "Closed loop, leaves dense at 30 % of the run and settles by 60 %.",
    "setpoint-gates": "Closed loop, learned gates in place of the saliency.",
    "setpoint-regrow": "Closed loop, dropped units may come back.",
    "setpoint-weights": "Closed loop, single weights masked by worth per theoretical FLOP, some replaced by gradient.",
    "setpoint-magnitude": "Closed loop, all groups at the same density, units by the norm of their weights.",
    "setpoint-random": "Closed loop, all groups at the same density, units at random.",
    "setpoint-latency": "Closed loop, the budget a fraction of the dense seconds of a step.",
    "setpoint-memory": "Closed loop, the budget a fraction of the dense peak bytes of a step.",
    "setpoint-memory-open": "As setpoint-memory, without feedback.",
    "hankel": "Closed loop over states of state-space layers, ranked by Hankel singular values.",
    "hankel-regrow": "As hankel; dropped states may come back.",
    "few-states": "A model that begins with few states, 28 by default, from scratch.",
    "setpoint-taught": "As setpoint, and learns the answers of the finished dense run as well.",
    "dense-taught": "As dense, and learns the answers of the finished dense run as well.",
    "cubic-taught": "As cubic, and learns the answers of the finished dense run as well.",
    "setpoint-long": "As setpoint, for as many steps as the dense run's training FLOPs pay for.",
    "cubic-long": "As cubic, for as many steps as the dense run's training FLOPs pay for.",
}
