/* Pictures that are wider than a phone scroll in their own box (book.css); such a box can be reached with the keyboard. */
(function () {
  "use strict";
  function mark() {
    for (const figure of document.querySelectorAll(".bd-article figure.align-default")) {
      if (figure.scrollWidth > figure.clientWidth + 1) figure.tabIndex = 0;
      else figure.removeAttribute("tabindex");
    }
  }
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
})();
