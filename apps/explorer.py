"""The explorer: look at captured runs in a browser. It reads runs; the Lab loads a model, when asked.

streamlit run apps/explorer.py --server.address 127.0.0.1 --browser.gatherUsageStats false -- RUN_OR_FOLDER [MODEL ...]
"""

import streamlit as st
from address import arrive
from opened import choose_run
from page_html import STYLE, markdown

from ling_probe.errors import LingProbeError

st.set_page_config(page_title="ling_probe", layout="wide")
page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", default=True),
        st.Page("views/tokens.py", title="Tokens"),
        st.Page("views/paths.py", title="Paths"),
        st.Page("views/steps.py", title="Steps"),
        st.Page("views/experts.py", title="Experts"),
        st.Page("views/specialisation.py", title="Specialisation"),
        st.Page("views/balance.py", title="Balance"),
        st.Page("views/compare.py", title="Compare"),
        st.Page("views/lab.py", title="Lab"),
    ]
)
st.html(STYLE)
try:
    arrive()
    choose_run()
    page.run()
except LingProbeError as error:
    st.error(markdown(str(error)))
