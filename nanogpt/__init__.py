"""The baseline trainer: GPT-2 as nanoGPT trains it, with exact resume, checked data and runs that are evidence."""
