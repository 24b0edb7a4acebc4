"""The chaos campaign: jobs run while processes and connections are killed, frozen and cut off. `make chaos`.

The sender of the jobs, the workers and the reader of the answers each write a ledger to disk. Afterwards the ledgers
must agree: each job that the broker accepted has ended exactly once.
"""
