"""Arithmetic on configurations, before any process group or GPU is touched. Importable without torch."""
