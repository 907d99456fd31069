"""The subcommands of `gatework`, one per file: `add` describes it to argparse, `run` does it."""
