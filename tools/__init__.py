"""Everything around a run: launching it, watching it, explaining it.

Imports no trainer; `nanogpt.common` only.
"""
