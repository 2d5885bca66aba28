"""Whether sequences use the same experts, and whether those do whose hidden states are alike.

    python analyses/usage_similarity.py RUN [--json] [--rows N]

`jaccard` below `pooled` says that sequences differ, below `token` that they do so beyond the words they hold. `correlation`
needs vectors: `ling-probe capture --activations router:LAYERS`; compare it with `family_correlation` and `token_correlation`.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("usage_similarity"))
