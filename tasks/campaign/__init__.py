"""Campaigns: a table of pictures in, the same table with the answers' columns out."""

from .errors import CampaignError, PlanError, TableError
from .limits import Limits
from .plan import Plan
from .progress import Progress
from .runner import Options, Summary, Watch, run

__all__ = [
    "CampaignError",
    "Limits",
    "Options",
    "Plan",
    "PlanError",
    "Progress",
    "Summary",
    "TableError",
    "Watch",
    "run",
]
