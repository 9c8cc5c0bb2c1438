#include "schedules/schedule.h"

#include <utility>

namespace pyar {

Schedule mirrored(const Schedule& reduce_scatter) {
  Schedule s = reduce_scatter;
  s.steps.assign(reduce_scatter.steps.rbegin(), reduce_scatter.steps.rend());
  for (Step& step : s.steps) {
    std::swap(step.sends, step.recvs);
    for (Transfer& t : step.sends) t.reduce = false;
    for (Transfer& t : step.recvs) t.reduce = false;
  }
  return s;
}

Schedule then(Schedule first, const Schedule& second) {
  first.steps.insert(first.steps.end(), second.steps.begin(), second.steps.end());
  return first;
}

}  // namespace pyar
