"""What several suites share: no test module imports from another one, but from here."""
