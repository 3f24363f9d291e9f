"""The typed configuration: schema, Hydra composition, and errors. Importable without torch."""
