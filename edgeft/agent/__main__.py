"""`python -m edgeft.agent`; on the device the same, as one executable file."""

import sys

from edgeft.agent.main import main

sys.exit(main())
