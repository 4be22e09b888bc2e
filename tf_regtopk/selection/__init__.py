"""Exactly the k largest entries."""

from tf_regtopk.selection.keys import Group
from tf_regtopk.selection.largest import select_largest
from tf_regtopk.selection.largest import take

__all__ = [
    "Group",
    "select_largest",
    "take",
]
