"""Files that are replaced at once: a reader sees the old one or the new one, and never half of it."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def replace_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 into a folder that exists. Of two writers the last one wins.

    Raises:
        OSError: if the folder cannot be written to; then nothing stays behind.
    """
    # A name of its own: several processes of one run may write the same file.
    unfinished = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
