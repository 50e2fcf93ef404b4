"""Objectives: one file each, with its settings, its loss and what it reports."""
