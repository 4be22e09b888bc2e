"""Exactly the k largest entries."""

from tf_regtopk.selection.keys import Group
from tf_regtopk.selection.largest import sample_suffices
from tf_regtopk.selection.largest import select_largest
from tf_regtopk.selection.largest import take

__all__ = [
    "Group",
    "sample_suffices",
    "select_largest",
    "take",
]
