"""Studies, one script each: ``python -m research.NAME --config configs/NAME/SCALE.yaml``."""
