"""The sections of scripts/gpu_report.py."""
