"""Which tokens, and which kinds of step, each expert is chosen for.

    python analyses/enrichment.py RUN [--json] [--rows N]

Names are found on one half of the sequences and measured on the other: `pmi_found` and `best_of_noise` show why.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("enrichment"))
