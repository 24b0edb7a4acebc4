"""The campaign: jobs, while everything under them is killed, frozen and cut off. `make chaos`.

Who sends jobs, who runs them and who reads their answers each write a ledger to disk. Afterwards the ledgers must
agree: each job that the broker accepted has ended, once.
"""
