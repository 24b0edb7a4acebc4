"""`idefics-jobs review`: doubtful answers, decided by a person."""

from __future__ import annotations

import click

from .console import BrokerGroup
from .review_lists import export_decisions, list_reviews, review_list
from .review_page import PORT, serve


@click.group(cls=BrokerGroup, invoke_without_command=True)
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=PORT, show_default=True, help="Of the page; 0 takes a free one."
)
@click.pass_context
def review(context: click.Context, port: int) -> None:
    """Decide about doubtful answers, those below their job's `min_confidence`.

    Without a command it serves a page for your browser and prints its address, until Ctrl-C: a picture, the question
    and the ranked answers, chosen by the keys 1 to 9. Only this machine can open it, and only with the token in that
    address. Several people may review at once.

    \b
    idefics-jobs review
    """
    if context.invoked_subcommand is None:
        serve(review_list(context.obj), port)


review.add_command(list_reviews)
review.add_command(export_decisions)
