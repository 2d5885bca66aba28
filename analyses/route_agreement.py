"""Whether two runs choose the same experts for the same tokens.

    python analyses/route_agreement.py RUN --against OTHER [--against ANOTHER] [--json] [--rows N]

Compare `agreement` with that of a repeat in another number format or batch size, the floor of numerical noise, and with
`chance` and `token_agreement`. Capture RUN with --keep logits to see it by margin.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("route_agreement"))
