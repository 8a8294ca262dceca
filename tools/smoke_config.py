"""Write a copy of the book's configuration under which nothing is executed: smoke_config.py SOURCE TARGET."""

import sys
from pathlib import Path

import yaml

source, target = map(Path, sys.argv[1:])
config = yaml.safe_load(source.read_text())
config["execute"]["execute_notebooks"] = "off"
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(yaml.safe_dump(config, sort_keys=False))
