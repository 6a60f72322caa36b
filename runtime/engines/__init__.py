"""Engines: one file per engine library behind one contract (`base.Engine`)."""
