"""What the user sees when a model cannot be captured, and how a line of the user's code is found."""

from __future__ import annotations

import os
import sys
from types import CodeType, TracebackType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OURS = tuple(_HERE + name + os.sep for name in ("compiler", "runtime", "cost_model"))


class CaptureError(ValueError):
    """A model, batch, loss function or optimizer that cannot be captured; the text names the place and the way out.

    placed: whether the text says where; if not, the recorder adds it.
    """

    def __init__(self, text: str, *, placed: bool = False) -> None:
        super().__init__(text)
        self.placed = placed


_is_user: dict[CodeType, bool] = {}


def _user_code(code: CodeType) -> bool:
    known = _is_user.get(code)
    if known is None:
        name = code.co_filename
        known = not name.startswith((_TORCH, *_OURS)) and not name.startswith("<") and "contextlib" not in name
        _is_user[code] = known
    return known


def user_line(depth: int = 1) -> str:
    """"file.py:123" of the innermost caller that is neither torch nor opweave; "" where there is none."""
    frame = sys._getframe(depth)
    while frame is not None:
        if _user_code(frame.f_code):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of_error(traceback: TracebackType | None) -> str:
    """"file.py:123" of the innermost frame of a traceback that is neither torch nor opweave."""
    found = ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if _user_code(code):
            found = f"{os.path.basename(code.co_filename)}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def place(path: str, line: str) -> str:
    """How errors name a place."""
    return f"capture failed in {path or 'the model'}" + (f" at {line}" if line else "")
