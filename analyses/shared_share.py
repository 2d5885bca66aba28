"""How much of what a routed layer adds comes from its shared expert, and whether it depends on the step.

    python analyses/shared_share.py RUN [--json] [--rows N]

Needs a run captured with --keep contribution. Norms alone are known: `least` and `most` are the bounds that they allow.
`difference` compares a label (family) with the others at equal tokens.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("shared_share"))
