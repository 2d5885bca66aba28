"""Whether routing passes through states that go with the steps of a solution, beyond what their words make.

    python analyses/routing_states.py RUN [--json] [--rows N]

`agreement` is information above shuffled labels over what there could be, by the `source` of the states; compare routing with
its tokens, and with routing as it would be by tokens alone. `duration` counts tokens.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("routing_states"))
