"""Where documents come from: directories, files of records, data sets, and mixtures of them."""

from t5g2.data.sources.config import STANDARD_LIBRARY, CorpusConfig
from t5g2.data.sources.documents import TokenizedTexts
from t5g2.data.sources.opening import TextSource, open_sources

__all__ = ["STANDARD_LIBRARY", "CorpusConfig", "TextSource", "TokenizedTexts", "open_sources"]
