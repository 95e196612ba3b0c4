"""The order of the stages over the states T0, T1, ...: the only file that knows Config, Run and the stages together.

1.  data       read the prompts, keep the exact records used
2.  measure    activation statistics of the state on unsafe and safe prompts
3.  select     scores of all neurons, and the safety neurons
4.  iterate    find, prune, find again: the neurons of the iterated attacker, if there is one
5.  rivals     what rival selectors find, and what the fine-tuning attack learns, if there are any
6.  attack     answers with neurons pruned: T0's (static), the state's own (adaptive, iterated), random ones; and others
7.  judge      verdicts on the answers
8.  capability benchmarks of what the state can do besides, if they are enabled
9.  pairs      preference pairs, once, from T0
10. align      train the next state with all neurons found so far frozen; back to 2
11. report     tables and figures over all states

With many processes, all of them go through the same stages. Rank 0 decides what is to be done, and only its files are
written (``runs``); the stages that compute with the model are done by all together, the others by rank 0 alone.
"""

from __future__ import annotations

PROMPTS = ("unsafe", "safe", "test_unsafe", "test_safe")
