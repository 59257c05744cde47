"""Does a model follow instructions better? Suites of prompts and checkers, asked over HTTP, compared in pairs."""
