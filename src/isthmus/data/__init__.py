"""From files to batches: formats, pictures, chat rendering, collation, mixing and generated scenes. No models here."""
