"""A cheap consumer that takes and never acknowledges: `taker.py URL TRANSPORT`, on the queue `jobs`."""

import sys

from kombu import Connection, Queue
from kombu.asynchronous import Hub, set_event_loop

hub = Hub()
set_event_loop(hub)
connection = Connection(sys.argv[1], transport=sys.argv[2])
connection.register_with_event_loop(hub)
with connection.Consumer([Queue("jobs")], on_message=lambda message: print("taken", flush=True)):
    hub.run_once()
    print("ready", flush=True)
    hub.run_forever()
