"""Whether different views of the experts find the same clusters.

    python analyses/cluster_agreement.py RUN [--json] [--rows N]

`ari` is 1 for the same clusters and 0 for chance; `ari_null` is what dealing experts anew inside their router group leaves.
Rows with `other` "router group" say how far the clusters merely follow the router's groups.
"""

import sys

from ling_probe.analysis import script_main

if __name__ == "__main__":
    sys.exit(script_main("cluster_agreement"))
