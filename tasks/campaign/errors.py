"""The errors of campaigns."""

from __future__ import annotations

from ..errors import IdeficsError


class CampaignError(IdeficsError, ValueError):
    """The campaign cannot be run as asked: correct what the message names."""

    code = "campaign"
    http_status = 422
    public = {"": "This cannot be run as it is asked for: tell the service's operator."}
