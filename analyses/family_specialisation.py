"""Which experts of a checkpoint prefer which family of problems.

    python analyses/family_specialisation.py RUN [--json] [--rows N]

`log2_ratio` is the effect at equal tokens, `raw_log2_ratio` with what the words themselves do; trust rows with a small
`q`. Families may differ in format too, which this cannot tell from their subject.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("family_specialisation"))
