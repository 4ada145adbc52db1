// Waits with a limit that steps of the wall clock neither lengthen nor shorten.
//
// Abseil before its LTS of August 2023 sleeps until a point of the wall clock: a step back by an hour makes a
// wait of a second one of an hour, and one forward ends it at once. gRPC waits with Abseil, so its timers
// (keepalive, deadlines, alarms) would stop with it. steady_waits.cc takes the place of the semaphore that
// Abseil's mutexes and condition variables sleep on, in every program that uses Clock::Real().
// Delete when Abseil >= 20230802.
#ifndef HW_BASE_STEADY_WAITS_H_
#define HW_BASE_STEADY_WAITS_H_

namespace headwater {

// Does nothing but make linkers take steady_waits.cc.
void LinkSteadyWaits();

}  // namespace headwater

#endif  // HW_BASE_STEADY_WAITS_H_
