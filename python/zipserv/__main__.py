# SPDX-License-Identifier: Apache-2.0
"""``python -m zipserv``: the same as the command ``zipserv``."""

from zipserv.cli import main

if __name__ == "__main__":
    main()
