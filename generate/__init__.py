"""Instruction data from a teacher: Self-Instruct, Evol-Instruct and Magpie, filtered, resumable and repeatable."""
