"""A small world with bad weather, in which the real machine has to keep its promises.

`python -m tests.simulation --seed 17 --minutes 10` replays one world; docs/simulation.md says what
is simulated, what is checked, and what is not claimed.
"""
