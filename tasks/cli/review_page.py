"""Serves the review page until Ctrl-C."""

from __future__ import annotations

from ..review import ReviewList
from ..review.server import ReviewServer
from ..review.session import Session
from .console import CommandError, echo
from .stopping import Stop

PORT = 8600


def serve(reviews: ReviewList, port: int) -> None:
    """Print the page's address, answer its requests until Ctrl-C or SIGTERM, and print what was decided."""
    session = Session(reviews)
    try:
        server = ReviewServer(session, port)
    except OSError as error:
        cure = "Choose another with --port; 0 takes a free one."
        raise CommandError(f"Cannot listen on port {port}: {error.strerror}. {cure}") from None
    echo(f"Open {server.address}")
    echo("Only this machine can, and only with this address. Ctrl-C ends it.", err=True)
    with Stop() as stop:
        while not stop.is_asked:
            server.handle_request()
        server.server_close()
    echo(session.summary())
