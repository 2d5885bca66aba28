"""How early in training the router settled.

    python analyses/router_saturation.py RUN --against CHECKPOINT [--against CHECKPOINT] [--json] [--rows N]

RUN is of the final model, the others of its snapshots, all on the same problems and without --generate. Compare `agreement`
with `chance` and `token_agreement`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("router_saturation"))
