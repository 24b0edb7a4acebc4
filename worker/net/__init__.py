"""Connections to addresses that are not trusted: which are allowed, how fast, and for how long.

`policy.py` decides, `guard.py` checks each connection when it is made, `idle.py` keeps some for the next request,
`session.py` makes the HTTP requests, `deadline.py` and `rate.py` limit their time and bytes.
"""
