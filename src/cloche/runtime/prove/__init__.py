"""Isolation that is proved: a script looks at its box from inside, and what it saw is judged here.

``observe`` reads what the prober (``supervisor/c/probe.c``) printed, ``judge`` makes guarantees of it; both are pure. ``prover``
makes the boxes, on the path of every run.
"""
