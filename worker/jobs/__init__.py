"""One job from its payload to its result.

`task.py` is the Celery task (retries, links, cancellation), `service.py` runs it on the model, `prompts.py` makes its
prompt, `row_builder.py` its row and `result_builder.py` its result.
"""
