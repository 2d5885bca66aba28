"""Which experts of a checkpoint prefer which kind of reasoning step.

    python analyses/label_specialisation.py RUN [--json] [--rows N]

`log2_ratio` is the effect at equal tokens, `raw_log2_ratio` with what the words themselves do; trust rows with a small
`q`. Where `overlap` is near 0 the label's words occur nowhere else, and meaning cannot be told from wording.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("label_specialisation"))
