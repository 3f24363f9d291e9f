"""NeMo-Aligner's trainers over our models (`trainer.backend=nemo_aligner`); docs/aligner.md says what of it is used."""
