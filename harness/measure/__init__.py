"""Measurements: raw samples in ms, MiB and device readings. No statistic and no verdict is formed here."""
