"""``python -m lcpaq_onnx``: the command line."""

import sys

from lcpaq_onnx.cli.main import main

sys.exit(main())
