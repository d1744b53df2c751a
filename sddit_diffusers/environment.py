"""What must be set before torch is loaded; the package imports this first."""

import os
import sys

# A thread that waits for others goes round 10,000 times before it sleeps; libgomp's own number is larger by
# far. Alone nothing becomes slower; beside another program a picture takes a quarter of the time
# (docs/troubleshooting.md). What a user has chosen stays.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
