"""Folds an adapter into the 16-bit weights it was trained for, tensor by tensor, and proves what was written."""

from edgeft.merging.choice import Candidate, Choice, choose
from edgeft.merging.fold import Merged, check_bindable, merge

__all__ = ["Candidate", "Choice", "Merged", "check_bindable", "choose", "merge"]
