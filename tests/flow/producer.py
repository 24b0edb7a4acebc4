"""A plain Celery producer that has never seen our code: `producer.py BROKER RESULTS`, jobs as JSON on standard input.

Prints, for each [task, arguments], its state and its result or its exception's class and arguments.
"""

import json
import sys

from celery import Celery

app = Celery("stranger", broker=sys.argv[1], backend=sys.argv[2])
app.conf.broker_transport_options = {"priority_steps": list(range(10))}
sent = [app.send_task(task, kwargs=arguments, queue="idefics") for task, arguments in json.load(sys.stdin)]
outcomes = []
for outcome in sent:
    value = outcome.get(timeout=120, propagate=False)
    if isinstance(value, Exception):
        value = [type(value).__name__, *value.args]
    outcomes.append([outcome.state, value])
print(json.dumps(outcomes))
