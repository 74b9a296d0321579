"""``python -m ine_callback``: the same as the command ``ine-callback``."""

from ine_callback.cli import main

raise SystemExit(main())
