"""Engines that answer prompts with the student's current weights."""
